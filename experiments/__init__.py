"""Our own trainings and benchmarks: they use the public surface of the package, which never imports them."""
