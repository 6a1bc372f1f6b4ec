"""v2 (pure): the V2 inference protocol of Triton and KServe, `inference.GRPCInferenceService`."""
