"""onnxruntime-web for `latency_lut.runtimes.onnxruntime_web`: the package, and workers that run JavaScript for Python."""
