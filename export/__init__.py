"""What tfkit exports, it measures: convert, verify, pack, measure."""
