"""Volumes on disk: NIfTI files, folders of cases, patches drawn from cases, and probability maps.

The package needs the extra ``calseg[train]`` (nibabel).
"""
