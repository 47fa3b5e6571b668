"""What a trained model is worth: its loss on text, its answers to questions with choices, the text that it writes."""
