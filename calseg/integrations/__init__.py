"""Parts that make calseg fit into the packages that people train with. Each needs its package; see the extras."""
