"""AWS, as all that speaks to it here does."""

from __future__ import annotations

import os
from typing import Any


def session() -> Any:
    """A new session of boto3, whose default one threads must not share.

    Its region is AWS_REGION where that is set, as for AWS's other tools; boto3 by itself looks in AWS_DEFAULT_REGION and the
    profile alone.
    """
    import boto3  # a folder, and a function that uses nothing of AWS, must not pay for it

    return boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
