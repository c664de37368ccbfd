"""Cache of decoded images: each image is decoded once for all epochs, ranks and later runs.

The data flow, and the modules in its order:

- the main process lists the images and asks ``image_set`` for their key and sizes;
- ``place`` chooses the disk or memory of each node, and checks its space;
- ``sharing`` lets all processes of a node write one file, whose format ``store`` defines;
- ``cached_split`` reads crops of images out of the memory-mapped file, in loader processes.

Three hardest cases shape the design. A builder killed at any instant: the file has a temporary
name until it is complete, its manifest is written last, and a builder holds a lock that ends with
it. Other processes that wait for an image decoded elsewhere: nobody waits in a lock, all processes
meet in short collective steps, which also carry errors, stop requests and progress. Memory: the
mapped pages are released again, so a process holds as much for ten times the images.
"""
