"""From folders to batches: layout -> samples -> checked images -> augmented batches."""
