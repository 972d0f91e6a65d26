"""Writers: made-up releases as they are downloaded, one file each, for the tests and the demo."""
