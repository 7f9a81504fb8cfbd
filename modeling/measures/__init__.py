"""What is done with a trained model: samples in parts, features, distances, neighbours, controls."""
