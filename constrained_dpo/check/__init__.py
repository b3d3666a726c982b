"""What is found out about a recipe before anything is trained."""
