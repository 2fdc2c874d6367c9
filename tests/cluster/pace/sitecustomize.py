"""Makes every step of a run last at least PACE seconds, so that a test can disturb it at a step of its choice.

A tiny model's hundred steps would otherwise be over before SLURM has looked at its clock once. The steps after the
last disturbance need no pace: they go as fast as they can once the file PACE_UNTIL is there.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

_SLOWED = "dinov2_fsdp.ssl.ema"


class _Slower(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _SLOWED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_slow(module):  # type: ignore[no-untyped-def]
            load(module)
            update = module.Ema.update

            def slow_update(self, *arguments):  # type: ignore[no-untyped-def]
                if not os.path.exists(os.environ["PACE_UNTIL"]):
                    time.sleep(float(os.environ["PACE"]))
                return update(self, *arguments)

            module.Ema.update = slow_update

        spec.loader.exec_module = load_and_slow
        return spec


if "PACE" in os.environ:
    sys.meta_path.insert(0, _Slower())
