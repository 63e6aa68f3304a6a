"""What compression cost: measures over logits, the table of confidence, and pictures of both."""
