"""Lets an unmodified mergekit know the merge method `dam`.

torch calls `activate` at the end of `import torch` (entry point group `torch.backends`). It only puts one finder
on `sys.meta_path`, which waits for mergekit's registry and registers `dam` once that module has run. Standard
library only; never raises, since an exception here would break `import torch` for the whole environment.
Off with MERGEKIT_DAM_AUTOLOAD=0, or TORCH_DEVICE_BACKEND_AUTOLOAD=0 for all such entry points.
"""

import importlib.util
import os
import sys
import warnings

TARGET = "mergekit.merge_methods.registry"


def _register():
    method = sys.modules.get("mergekit_dam.plugin.method")
    if method is not None and not hasattr(method, "register_dam"):
        return  # its import is what brought mergekit in; it registers itself at its end
    try:
        from mergekit_dam.plugin.method import register_dam

        register_dam()
    except Exception as error:
        warnings.warn(f"mergekit-dam: merge method 'dam' is not available: {error!r}", stacklevel=2)


class RegistryFinder:
    """Finds nothing itself: wraps the real loader of TARGET, once, and steps aside."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        try:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec is None or spec.loader is None:
                return None
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _register()

            spec.loader.exec_module = exec_module
            return spec
        except Exception:
            return None


def activate():
    """Entry point; see the module's text."""
    try:
        if os.environ.get("MERGEKIT_DAM_AUTOLOAD", "1") == "0":
            return
        if hasattr(sys.modules.get(TARGET), "register"):
            _register()
        elif not any(type(finder) is RegistryFinder for finder in sys.meta_path):
            sys.meta_path.insert(0, RegistryFinder())
    except Exception as error:
        warnings.warn(f"mergekit-dam: autoload is off: {error!r}", stacklevel=2)
