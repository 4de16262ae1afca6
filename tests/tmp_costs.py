import sys
from megatron_ds.parallel import context
from megatron_ds.training.costs import *
from megatron_ds.training.meter import Meter
from megatron_ds.training.progress import Progress
from tests.helpers.ranks import run_ranks
from tests.parity.harness import RECIPE, STYLES, arguments, batches, start, steps
import tests.parity.harness as H

def work(argv, style):
    engine = start(argv); engine.initialise()
    meter = Meter(engine)
    inner = H.train_step
    def stepped(engine, schedule, progress, *a, **k):
        with meter.step(progress):
            return inner(engine, schedule, progress, *a, **k)
    H.train_step = stepped
    steps(engine, Progress(loss_scale=engine.loss_scaling.start()), batches(STYLES[style], 3))
    text = meter.report(RECIPE)
    p = predict(engine.run, RECIPE, engine.run.parallel.world.rank, meter.costs.num_microbatches)
    context.stop()
    return p, meter.costs, text

if __name__ == '__main__':
    cases = [c.strip() for c in open(sys.argv[1]) if c.strip()]
    for c in cases:
        n, style, *flags = c.split()
        try: out = run_ranks(work, int(n), arguments(STYLES[style], *flags), style)
        except Exception as e: print(c, 'FAILED', str(e)[-600:]); continue
        ok = [p == m for p, m, _ in out]
        print(c, ok)
        if not all(ok) or '-v' in sys.argv:
            print(out[0][2])
