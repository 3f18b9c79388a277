"""Layouts of datasets, one file each; ``scan.Layout`` is what a file must answer."""
