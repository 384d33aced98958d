"""What an evaluation is made of: cells, folds, methods, answers, scores, figures and the card."""
