"""Extensions of mpdsgr-deploy, found by their entry points."""
