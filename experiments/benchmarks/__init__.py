"""What the regularizers cost: one script for each question, one harness for all."""
