"""Run in the environment that merges: commands one after the other, so that imports are paid once.

python -m tests.adapterhub.commands '[["method=soup", …], …]'
"""

from __future__ import annotations

import json
import sys

from hydra.core.global_hydra import GlobalHydra

from mergelab.__main__ import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        GlobalHydra.instance().clear()
        sys.argv = ["mergelab", *arguments]
        main()
