"""What several tests share: cases with known truths, models, archives, harnesses."""
