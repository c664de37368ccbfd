"""Data sets, from folders on disk to batches. The modules in the order of the data:

- a data set: ``layout`` (with a module for each layout), ``folders``, ``split_names``, ``dataset``;
- archives: ``archive``, ``archive_index``, ``unpacked_tar``;
- samples: ``splits``, decoded by ``images`` and ``repair``, in the order of ``sample_order``;
- checked images: ``image_check``; decoded images: ``cache``;
- inputs: ``geometry``, ``augmentation``, ``presets``, ``preprocessing``, ``pretrained`` and
  ``preprocessing_options``;
- augmented batches: ``batches``, ``samplers``, ``loader``, ``worker``.
"""
