"""The main job: base -> (slim -> fine-tune -> keep the best) x rounds."""
