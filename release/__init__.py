"""What a release is made with: wheels and their trial, and the check of its tag."""
