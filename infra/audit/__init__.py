"""The audit bundle: what an outside reader needs to judge a deployment, in one folder whose files can be checked."""
