"""Recovery: the narrow network learns from the wide one on calibration images without labels."""
