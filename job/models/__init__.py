"""Networks: construction by name, classifiers, inputs and outputs, weights files.

``factory`` builds a network, from ``student``, ``cifar``, torchvision or a ``custom_network``;
``weights_file`` reads a state dict and ``weights`` loads it.
"""
