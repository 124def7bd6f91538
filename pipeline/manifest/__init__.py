"""The clip table: from a CSV, a Parquet file or a folder to checked clips."""

from patchbank.pipeline.manifest.table import ClipTable, read_manifest

__all__ = ["ClipTable", "read_manifest"]
