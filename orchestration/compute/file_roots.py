"""Folders of files below a URL, `file://…` or `s3://bucket/prefix`, as Arrow's file systems reach them."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from schemas.urls import local_folder


def open_root(url: str) -> tuple[str, pafs.FileSystem]:
    """The path and the file system of a `file://` or `s3://` URL."""
    folder = local_folder(url)
    return _s3(url) if folder is None else (str(folder), pafs.LocalFileSystem())


def list_files(files: pafs.FileSystem, folder: str) -> list[str]:
    """The paths of all files below `folder`, in order; none if it is not there."""
    return [info.path for info in list_infos(files, folder)]


def list_infos(files: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Path, size and time of all files below `folder`, in order of their paths; none if it is not there."""
    found = files.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=True))
    return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)


def _s3(url: str) -> tuple[str, pafs.FileSystem]:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError("name a bucket: s3://bucket/prefix")
    options: dict[str, str] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return f"{parts.netloc}{parts.path}".rstrip("/"), pafs.S3FileSystem(**options)
