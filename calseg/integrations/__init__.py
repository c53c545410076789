"""Use of calseg inside the packages that people train with. Each part needs its package; see the extras."""
