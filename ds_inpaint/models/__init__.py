"""Model families, one file each; the only files that import diffusers and transformers."""

import os

# Their progress bars and advice to developers would bury the run's own bar; errors still raise.
for name, value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(name, value)
