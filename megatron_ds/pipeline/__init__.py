"""Order of work: schedules as printable data, and the executor that runs them."""
