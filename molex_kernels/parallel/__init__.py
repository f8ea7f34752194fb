"""Models over several ranks, on `torch.distributed`; imported when asked for.

from molex_kernels.parallel import ExpertParallel
parallelize_module(model, mesh["ep"], {"layers.*.experts": ExpertParallel()})
"""

from molex_kernels.parallel.style import ExpertParallel

__all__ = ["ExpertParallel"]
