"""Log the metrics of a run to Weights & Biases, TensorBoard, MLflow and Kubeflow."""
