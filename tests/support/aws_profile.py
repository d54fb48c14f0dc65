"""Prints the keys that AWS's SDK finds for each profile that is named.

usage: AWS_SHARED_CREDENTIALS_FILE=… aws_profile.py PROFILE…
"""
import sys

import boto3

for name in sys.argv[1:]:
    found = boto3.Session(profile_name=name).get_credentials()
    print(name, found.access_key, found.secret_key, found.token)
