"""What stands behind `tfkit.compression.compress`: the tables of candidates, training, judging, results and plots."""
