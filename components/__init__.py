"""What happens to the data: one room per part of the journey, one file per stage, one public verb per file."""
