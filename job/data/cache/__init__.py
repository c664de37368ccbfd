"""Cache of decoded images: each image is decoded once for all epochs, ranks and later runs.

The data flow, and the modules in its order:

- the main process lists the images and asks ``image_set`` for their key and sizes;
- ``place`` chooses the disk or memory of each node, and checks its space;
- ``sharing`` lets all processes of a node write one file, whose format ``store`` defines;
- ``cached_split`` reads crops of images out of the memory-mapped file, in loader processes.

Three cases shape the design. A builder may be killed at any instant: the file has a temporary name
until it is complete, its manifest is written last, and the lock of a builder ends with its process.
A process may need images that others decode: no process waits for a lock, and all of them take
short collective steps, which also exchange errors, stop requests and progress. Memory must not
grow with the number of images: mapped pages are released again.
"""
