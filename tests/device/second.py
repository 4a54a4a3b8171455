"""The device "second" of second.cpp: built once per PyTorch, then known to PyTorch as any other device."""

import hashlib
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch

SOURCE = Path(__file__).with_name("second.cpp")


def library():
    """The compiled library, from the temporary folder if it has been built before."""
    text = SOURCE.read_bytes() + torch.__version__.encode()
    made = Path(tempfile.gettempdir()) / f"jensen_second_{os.getuid()}_{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not made.exists():
        home = Path(torch.__file__).parent
        partial = made.with_suffix(f".{os.getpid()}")
        headers = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        build = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", *headers, str(SOURCE), "-o", str(partial), *libraries]
        subprocess.run(build, check=True, capture_output=True, text=True)
        partial.replace(made)
    return made


def register():
    """Register the device; once per process."""
    if hasattr(torch, "second"):
        return
    torch.utils.rename_privateuse1_backend("second")
    torch.ops.load_library(str(library()))
    module = types.ModuleType("torch.second")
    state, set_state, seed = torch.ops.second.state, torch.ops.second.set_state, torch.ops.second.seed
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = (lambda: 1), (lambda: 0)
    module.synchronize = lambda device=None: None
    module.manual_seed = module.manual_seed_all = lambda value: seed((value + 1) % 2**63)  # not the processor's numbers
    module.get_rng_state, module.set_rng_state = (lambda device=0: state()), (lambda new, device=0: set_state(new))
    module.get_rng_state_all, module.set_rng_state_all = (lambda: [state()]), (lambda new: set_state(*new))
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    sys.modules["torch.second"] = module
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    _let_parameters_move()


def _let_parameters_move():
    """Let a parameter stay the same object when its module moves, as between the processor and a GPU."""
    usual = torch.Tensor.data

    def assign(self, new):
        if self.device == new.device:
            usual.__set__(self, new)
        else:
            torch.ops.second.move_data(self, new.detach())

    apply = torch.nn.Module._apply

    def moving(self, fn, recurse=True):
        with mock.patch.object(torch, "_has_compatible_shallow_copy_type", return_value=True):
            return apply(self, fn, recurse)

    torch.nn.Module._apply = moving
    torch.nn.Parameter.data = property(usual.__get__, assign)
