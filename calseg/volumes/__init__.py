"""Volumes on disk: NIfTI files, folders of cases, patches drawn from them, probability maps.

Needs the extra ``calseg[train]`` (nibabel).
"""
