"""What makes up for the channels that are cut."""
