"""What a representation is good for: prediction, reconstruction, generation, fine-tuning."""
