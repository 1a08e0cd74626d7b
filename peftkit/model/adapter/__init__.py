"""The adapter: attached, loaded, grown, and read off as edits of the base's weights."""
