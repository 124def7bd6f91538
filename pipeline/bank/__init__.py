"""The bank: tokens of one encoder over one table of clips, as a Zarr v3 group."""
