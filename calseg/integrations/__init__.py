"""Use of calseg inside other packages: a module for each package, which needs that package."""
