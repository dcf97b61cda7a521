"""`spconv`, where spconv-triton stands in for it.

mmdet3d imports sparse convolutions as `spconv` and `spconv.pytorch`, and spconv-triton has another name. So
setup/sparse_convolution.py copies this file into the environment as `spconv.py`. It can go when spconv has wheels for
the CUDA of torch, or when mmdet3d can be told what to import.
"""

from __future__ import annotations

import sys

import spconv_triton
import spconv_triton.pytorch

# mmdet3d asks for version 2 or later: this is the version of spconv that spconv-triton translates.
__version__ = ".".join(map(str, spconv_triton.SPCONV_VERSION_NUMBERS))
pytorch = spconv_triton.pytorch

# Each module under its second name, too: `import spconv.pytorch.ops` would otherwise load a second copy, whose classes
# are not those of the first.
for _name in [name for name in sys.modules if name.startswith("spconv_triton.")]:
    sys.modules[f"spconv{_name.removeprefix('spconv_triton')}"] = sys.modules[_name]
