"""A run as the user sees it: its configuration, its folder, and the steps that the commands share."""
