"""What teachers give to students, online or from a store."""
