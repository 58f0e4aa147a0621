"""The local mail sink: an SMTP server that keeps every mail as a file.

`python -m simulators.mail --address 127.0.0.1:2525 --dir mail` takes mail from anyone
who reaches the address, sends none on, and keeps each as an `.eml` file that any mail
program opens. `simulators.mail.mailbox` reads such a folder, and `meshctl mail` lists
it. Recipients of the names in `simulators.mail.sink` are refused, deferred or cut off,
so that a sender's handling of trouble can be tried over a real socket.

It has neither TLS nor login. It belongs on a loopback or a pod network.
"""
