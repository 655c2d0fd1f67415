"""Password hashes of other products, with their passwords.

MADE: hashes of PASSWORD by the products themselves, each with the version. PUBLISHED: hashes from specifications, tests
and documentation.
"""

from service.core.passwords.schemes import sources

PASSWORD = "correct horse battery staple \u00e9"
MADE = [
    (
        "django 5.2.19 pbkdf2_sha256",
        "django_pbkdf2",
        "pbkdf2_sha256$1000000$rA1ddwjGIK48eJfqCXLgNo$a9DlNwhVtoZajaVa0JEbD8WkJSUpjoh7/9VTFJIHGD8=",
    ),
    (
        "django 5.2.19 pbkdf2_sha1",
        "django_pbkdf2",
        "pbkdf2_sha1$1000000$FxJy1TrJep6vz1ldpVXqf6$utgQssSSt1B/m+tUEKGm72p0szk=",
    ),
    (
        "django 5.2.19 argon2",
        "argon2",
        "argon2$argon2id$v=19$m=102400,t=2,p=8$RVFOc2x1Y1RoclR6UWxidGhad3BNaA$N06Rkem/hja/c4hAztcZEqBYlgXzWbZAn8wWxsVxNL8",
    ),
    (
        "django 5.2.19 bcrypt_sha256",
        "django_bcrypt_sha256",
        "bcrypt_sha256$$2b$12$l8zdMMDAH4vgbH6QjJyDYO823xBxKy90fHeHilhMlNOpOxezsazpK",
    ),
    ("django 5.2.19 bcrypt", "bcrypt", "bcrypt$$2b$12$l7qkP1ypw51JrQhg7BjCTeth6fruMwAleeH/KRFf1KqoJy8rVOYPa"),
    (
        "django 5.2.19 scrypt",
        "django_scrypt",
        "scrypt$16384$1qn94oPyOHBueGi7LDFKZk$8$5$aSHg3b2+SYGOjgjs68B77XgAkMGK++bCe/RV32FUA5tlipBX5jVElSR/3dGbtAVAgOoyyp++OZgR4JpcSt6PTg==",
    ),
    ("django 5.2.19 md5", "django_digest", "md5$g8jeO3ieT1fprabGPIUH1i$b72381413ef758ade3d23b04feb7a276"),
    (
        "werkzeug 3.1.9 scrypt",
        "werkzeug_scrypt",
        "scrypt:32768:8:1$akjzcP0E1JquIQYd$40aaee59aab14bcd95ad90650f09cbcab4f190896ded5ee4d1b8f0c0bb56141d8a46dab221d3fd99c4596cb57f35dabb6f2a348dfd21a7cd01ceec8808b58a7a",
    ),
    (
        "werkzeug 3.1.9 pbkdf2",
        "werkzeug_pbkdf2",
        "pbkdf2:sha256:1000000$gWPAiVLKvlC0RloR$857fd37c85914837da08cf6256f586193f2755c7c6bf6ad495f4f6c986a908f5",
    ),
    (
        "werkzeug 3.1.9 pbkdf2:sha512:50000",
        "werkzeug_pbkdf2",
        "pbkdf2:sha512:50000$nVymrvtVhKR4Uymh$9dc1d48d53516dedadaf3171a5289829c329e695733c6c6daa83fbf1a6416345a6d4983e7f3304e9cd6cb309f38319dfc94eea1cbe106802d49a8de8e81f82d4",
    ),
    (
        "werkzeug 3.1.9 pbkdf2:sha1:1000",
        "werkzeug_pbkdf2",
        "pbkdf2:sha1:1000$WrgIt5SyEpcvOCfA$09f49f45b4ea0002c73470a9866d07994ca72742",
    ),
    (
        "argon2-cffi 25.1.0 id",
        "argon2",
        "$argon2id$v=19$m=65536,t=3,p=4$2F7ds6HgkoI+RIYNDz6snw$utmhOha2tf9Ov6e3qXsPk/Oh5XyC5MMaJe95ZLmY+MY",
    ),
    (
        "argon2-cffi 25.1.0 i",
        "argon2",
        "$argon2i$v=19$m=1024,t=2,p=4$EHarcRPrH+ULD3kgW6cFrQ$yQG7j0F13mxXcGvcqvVhp7ZiDw7qbLhZAOfQ94ZFGl8",
    ),
    ("libpass 1.9.4 pbkdf2_sha1", "pbkdf2", "$pbkdf2$131000$DSFEqNVai9HaW0sJwThnzA$DUJsKrEJdVHYjMh0GLCEFx3ruCk"),
    (
        "libpass 1.9.4 pbkdf2_sha256",
        "pbkdf2",
        "$pbkdf2-sha256$29000$Uyql1HpvTQlhrBWCUCoFwA$qbEzeBFpIbHlQeD3DRKPC7zpxgYUKLy1fGKWM35EYsg",
    ),
    (
        "libpass 1.9.4 pbkdf2_sha512",
        "pbkdf2",
        "$pbkdf2-sha512$25000$jpGytlbKmXNOKWUspTRmzA$f1q772zvsW.vpT0Dv5XP2S7cbSemvrTFRRhJcyx0mOX7YO593cW9bLARiyeXHEV6yfaAnPIb9MD6LSx.W10TnA",
    ),
    (
        "libpass 1.9.4 scrypt",
        "scrypt",
        "$scrypt$ln=16,r=8,p=1$au29d87Zu1fKuTcmREjJGQ$xCXuzhwQ7wqf8ec0hIO7fQ7Tfc6P+ww6rg+hMYO9rw8",
    ),
    (
        "libpass 1.9.4 sha512_crypt",
        "sha512_crypt",
        "$6$rounds=1000$OJ3l2Riu58suCfK3$oXpaCs6heJ65KHYzE4Aol94IBFynO2wBCNw1TvXFbQ2lTNoDknFFiDjI417ssskGTAvW.TO.YcFbdDGU9tfdf.",
    ),
    (
        "libpass 1.9.4 sha256_crypt",
        "sha256_crypt",
        "$5$rounds=1000$tIMB5NOAS6nAvklq$5pOHvbENa/VeWt.KBOGsHD/itAB3w/TkUYIvuCSVbyD",
    ),
    ("libpass 1.9.4 md5_crypt", "md5_crypt", "$1$JU4MVxbG$8OQuYkE9PGjc2pTYrN7DC/"),
    ("libpass 1.9.4 apr_md5_crypt", "apr1", "$apr1$KD5Ofrog$ho1NOfTKYM8l5NHWliCZE1"),
    ("libpass 1.9.4 phpass", "phpass", "$P$6FY3cHAGJlhp3vOFX4NlLLqVLDqGEU/"),
    ("libpass 1.9.4 ldap_salted_sha1", "ldap_digest", "{SSHA}mm4JMjH1bXZIQ68ND4eQmkhKe+tKScnZ"),
    (
        "libpass 1.9.4 ldap_salted_sha256",
        "ldap_digest",
        "{SSHA256}96yFkvz8VWuxHO96BFiTmf5mUEbcSU1b2srmq6/tpEcTglCKcW7NGQ==",
    ),
    (
        "libpass 1.9.4 ldap_salted_sha512",
        "ldap_digest",
        "{SSHA512}PBGpFqpRvPwyEl/uK+LvncmHA9LoCta/g7orsKhuHp/a73zVuVljDgZmwustjbI7asfeVKF2qvCA5l9l97z21tR6jzHmfE9p",
    ),
    ("libpass 1.9.4 ldap_salted_md5", "ldap_digest", "{SMD5}Gxo2Zjj47q0V2M3C4iFn1W2NcS4="),
    ("libpass 1.9.4 ldap_md5", "ldap_digest", "{MD5}mTqLRE3H3OwBffNAAejZIw=="),
    ("libpass 1.9.4 ldap_sha1", "ldap_digest", "{SHA}fg5p0F+EdMmBTSB39UcjGl/Emrw="),
    (
        "libpass 1.9.4 ldap_pbkdf2_sha256",
        "pbkdf2",
        "{PBKDF2-SHA256}29000$ea8VgjCm1FpLSWkNwfjfGw$kBPOtnik4Y4eJMEphUl2UPgY8zWTAiCQPQAwEiH2EM4",
    ),
    (
        "libpass 1.9.4 ldap_sha512_crypt",
        "sha512_crypt",
        "{CRYPT}$6$rounds=1000$ObHUukcRwaanEbq6$k4rB2Q8FPqF0S6FFXkYbrdR2ih3Leg2A5vksNH/j4805es2h1xV5Xa3awJv1Ko/sCbRuPfEiDrB.hGXd5AMLe0",
    ),
    (
        "libpass 1.9.4 django_pbkdf2_sha1",
        "django_pbkdf2",
        "pbkdf2_sha1$131000$IB7v2wrIZRLQ$4Ikw523nxlQxdUJACUHyHWs5jF0=",
    ),
    ("libpass 1.9.4 django_salted_sha1", "django_digest", "sha1$PisPvuIIfzrv$5db9508b5b91d650c44ca476288c2f57d7033bad"),
    (
        "libpass 1.9.4 bcrypt_sha256",
        "bcrypt_sha256",
        "$bcrypt-sha256$v=2,t=2b,r=12$h9zvd1PkzeFsC2MMZQbjq.$5iTmV.ilFicWaRJASncjEKgdOXlvhvG",
    ),
    (
        "libpass 1.9.4 bcrypt_sha256 v1",
        "bcrypt_sha256_v1",
        "$bcrypt-sha256$2b,4$APYFvbrYrgVBionfT541oO$50JiQr3Py.bbs8ex7OrIWNQHmqK3iGe",
    ),
    ("php 8.2.36 2y", "bcrypt", "$2y$04$K8dyindJsyRBgPmz.YBm2eFRqbMzED9aCaFkKgq8HcUGY.2cohyum"),
    (
        "php 8.2.36 argon2id",
        "argon2",
        "$argon2id$v=19$m=65536,t=4,p=1$bm1Vd25Fb1BCMTF0RHVsTA$bE3WRlN7FKEzDiccb5GYB9ihVGQsQ1G7Jrw4GGtn5v8",
    ),
    (
        "php 8.2.36 sha512",
        "sha512_crypt",
        "$6$rounds=1000$abcdefgh$W5yM1HGDVkLkB5Q/OHG1UIVOOPd7i.RFJwnrjf6yAl4sXIRe0IybfTBZ16OnsC8xqnM0ZVLq//kOYLxBiQlwu0",
    ),
    ("php 8.2.36 sha256", "sha256_crypt", "$5$saltsalt$8sv3m9K3UpPjsOBTOMiVNa5.c5v3xQSp4wN8Rnq/pw/"),
    ("php 8.2.36 md5", "md5_crypt", "$1$saltsalt$7VN7NopmgpKiKWnNonTNc0"),
    ("php 8.2.36 wp", "wordpress_bcrypt", "$wp$2y$04$wAD2HL3LfLve/AAct54wOuMNCwEUpws.js06PCgP5ZhVaja5H9ywi"),
    ("htpasswd 2.4.71 bcrypt", "bcrypt", "$2y$05$ioj/yOgbXuZQNw09yW04au9QN8XhinUK5umK3ozCrXD1yUQK0vpEO"),
    ("htpasswd 2.4.71 apr1", "apr1", "$apr1$JAwrQjmt$gAdkqmIMVWvIEMzoRPVSI."),
    ("htpasswd 2.4.71 sha", "ldap_digest", "{SHA}fg5p0F+EdMmBTSB39UcjGl/Emrw="),
    (
        "htpasswd 2.4.71 sha512",
        "sha512_crypt",
        "$6$t4RDVMh/VroC/SPZ$j3kffsVq6MLEIQil3eiaVsZpvHwSpQtMOkd3dqrM3GNyY2u7rjLcl1BzYJeqBZ4QTX1ml2Z.1DYTgYilu16dX/",
    ),
    ("htpasswd 2.4.71 sha256", "sha256_crypt", "$5$x6pgAfjhqNrYHM3H$ndZcZq8Pzb736IPgaZ9XKZunqmsP6uUQfV43huo3tH1"),
    (
        "openssl passwd -6",
        "sha512_crypt",
        "$6$woz/x9GMORru9fpL$NyN1vsNQbEc8KCLgYW0FZ6/WZj9t0N2n95mocGP34ReWn8xVFCXAAox/dZINjmPnwi4ta8wIlFlD80cbf.dUj1",
    ),
    ("openssl passwd -5", "sha256_crypt", "$5$tcB/12uFr6cRL/3L$pFAQ5uzq0hoMI9.6Opqq8RRMQNgwWayh2jg4SpORmj7"),
    ("openssl passwd -1", "md5_crypt", "$1$C9zZA/xd$qlWmJBorY3DbF3NjncaIZ0"),
    ("openssl passwd -apr1", "apr1", "$apr1$49CllLB5$2aYL6XtXdqd1eetep4tsU."),
]
PUBLISHED = [
    # RFC 6070 and RFC 7914, in the form of Werkzeug
    ("RFC 6070", "password", "pbkdf2:sha1:4096$salt$4b007901b765489abead49d926f721d065a429c1"),
    (
        "RFC 7914, PBKDF2",
        "Password",
        (
            "pbkdf2:sha256:80000$NaCl$4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56"
            "a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d"
        ),
    ),
    (
        "RFC 7914, scrypt",
        "pleaseletmein",
        (
            "scrypt:16384:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
            "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
        ),
    ),
    # The reference implementation of Argon2
    (
        "argon2id",
        "password",
        "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
    ),
    (
        "argon2i",
        "password",
        "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA",
    ),
    (
        "argon2i before version 1.3",
        "password",
        "$argon2i$m=65536,t=2,p=1$c29tZXNhbHQ$9sTbSlTio3Biev89thdrlKKiCaYsjjYVJxGAL3swxpQ",
    ),
    # crypt_blowfish
    ("bcrypt", "U*U", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"),
    # The documentation of passlib
    (
        "passlib pbkdf2",
        "password",
        "$pbkdf2-sha256$6400$.6UI/S.nXIk8jcbdHx3Fhg$98jZicV16ODfEsEZeYPGHU3kbrUrvUEXOPimVSQDD44",
    ),
    (
        "passlib scrypt",
        "password",
        "$scrypt$ln=16,r=8,p=1$aM15713r3Xsvxbi31lqr1Q$nFNh2CVHVjNldFVKDHDlm4CbdRSCdEBsjjJxD+iCs5E",
    ),
    (
        "passlib bcrypt_sha256",
        "password",
        "$bcrypt-sha256$v=2,t=2b,r=12$n79VH.0Q2TMWmt3Oqt9uku$Kq4Noyk3094Y2QlB8NdRT8SvGiI4ft2",
    ),
    # The specification of SHA-crypt, by U. Drepper
    ("sha256_crypt", "Hello world!", "$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5"),
    (
        "sha512_crypt",
        "Hello world!",
        "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
    ),
    # The examples of hashcat
    ("md5_crypt", "hashcat", "$1$28772684$iEwNOgGugqO9.bIz5sk8k/"),
    ("apr1", "hashcat", "$apr1$71850310$gh9m4xcAn3MGxogwX/ztb."),
    ("drupal7", "hashcat", "$S$C33783772bRXEx1aCsvY.dqgaaSu76XmVlKrW9Qu8IQlvxHlmzLf"),
    ("phpBB", "hashcat", "$H$984478476IagS59wHZvyQMArzfx58u."),
    ("django pbkdf2", "hashcat", "pbkdf2_sha256$20000$H0dPx8NeajVu$GiC4k5kqbbR9qWBlsRgDywNqC2vd9kqfk7zdorEnNas="),
    ("django sha1", "hashcat", "sha1$fe76b$02d5916550edf7fc8c886f044887f4b1abf9b013"),
    ("SHA", "hashcat", "{SHA}uJ6qx+YUFzQbcQtyd2gpTQ5qJ3s="),
    ("SSHA", "hashcat", "{SSHA}AZKja92fbuuB9SpRlHqaoXxbTc43Mzc2MDM1Ng=="),
    (
        "SSHA512",
        "hashcat",
        "{SSHA512}ALtwKGBdRgD+U0fPAy31C28RyKYx7+a8kmfksccsOeLknLHv2DBXYI7TDnTolQMBuPkWDISgZr2cHfnNPFjGZTEyNDU4OTkw",
    ),
    # phpass, by Openwall, in its test
    ("phpass", "test12345", "$P$9IQRaTwmfeRo7ud9Fh4E2PdI0S3r.L0"),
    # DokuWiki, which reads Drupal's
    ("drupal6 in 7", "pouette1234", "U$S$9c47LGZuhR6TvhRQXzymkJIQ3mXthUCc6KDEGTt4B7eOL/H9Ykuy"),
    ("WordPress 6.8", "admin", "$wp$2y$10$Q1xinFjrZeLWJBvxviIL6u834Fu.evIEFHAUVisQ5O.w9Dm0sMdES"),
    # The tests of ASP.NET Core Identity
    ("identity v2", "my password", "AAABAgMEBQYHCAkKCwwNDg+ukCEMDf0yyQ29NYubggHIVY0sdEUfdyeM+E1LtH1uJg=="),
    ("identity v3, SHA-1", "my password", "AQAAAAAAAAD6AAAAEAhftMyfTJylOlZT+eEotFXd1elee8ih5WsjXaR3PA9M"),
    (
        "identity v3, SHA-256",
        "my password",
        "AQAAAAEAA9CQAAAAIESkQuj2Du8Y+kbc5lcN/W/3NiAZFEm11P27nrSN5/tId+bR1SwV8CO1Jd72r4C08OLvplNlCDc3oQZ8efcW+jQ=",
    ),
    # The documentation of Spring Security
    ("Spring bcrypt", "password", "{bcrypt}$2a$10$dXJ3SW6G7P50lGmMkkmwe.20cQQubK3.HZWzG3YB1tlRy.fqvM/BG"),
    (
        "Spring pbkdf2",
        "password",
        "{pbkdf2}5d923b44a6d129f3ddf3e3c8d29412723dcbde72445e8ef6bf3b508fbf17fa4ed4d6b99ca763d8dc",
    ),
    (
        "Spring scrypt",
        "password",
        (
            "{scrypt}$e0801$8bWJaSu2IKSn9Z9kM+TPXfOc/9bdYSrN1oD9qfVThWEwdRTnO7re7Ei+fUZRJ68k9lTyuTeUp4of4g24hHnazw=="
            "$OAOec05+bXxvuu/1qZ6NUR+xQYvYv7BeL1QxwRpY5Pc="
        ),
    ),
    (
        "Spring sha256",
        "password",
        "{sha256}97cde38028ad898ebc02e690819fa220e88c62e0699403e94fff291cfffaf8410849f27605abcbc0",
    ),
    ("Spring MD5", "password", "{MD5}5f4dcc3b5aa765d61d8327deb882cf99"),  # as RFC 1321 computes it
    # The tests of Kratos
    (
        "Kratos pbkdf2",
        "test",
        (
            "$pbkdf2-sha512$i=100000,l=32$bdHBpn7OWOivJMVJypy2UqR0UnaD5prQXRZevj/05YU"
            "$+wArTfv1a+bNGO1iZrmEdVjhA+lL11wF4/IxpgYfPwc"
        ),
    ),
    (
        "Kratos scrypt",
        "test",
        (
            "$scrypt$ln=16384,r=8,p=1$2npRo7P03Mt8keSoMbyD/tKFWyUzjiQf2svUaNDSrhA="
            "$MiCzNcIplSMqSBrm4HckjYqYhaVPPjTARTzwB1cVNYE="
        ),
    ),
    (
        "Kratos firescrypt",
        "8x4WjoDbSxJZdR",
        (
            "$firescrypt$ln=14,r=8,p=1$sPtDhWcd1MfdAw==$xbSou7FOl6mChCyzpCPIQ7tku7nsQMTFtyOZSXXd7tjBa4NtimOx7v42Gv2SfzPQ"
            "u1oxM2/k4SsbOu73wlKe1A==$Bw==$YE0dO4bwD4JnJafh6lZZfkp1MtKzuKAXQcDCJNJNyeCHairWHKENOkbh3dzwaCdizzOspwr/FITUVln"
            "OAwPKyw=="
        ),
    ),
    ("Kratos SSHA256", "test123", "{SSHA256}czO44OTV17PcF1cRxWrLZLy9xHd7CWyVYplr1rOhuMlx/7IK"),
    ("Kratos md5", "ory", "$md5$ptoWyof5SobW+pbZu2QXoQ=="),
    ("Kratos md5 with text", "ory", "$md5$pf=e1BBU1NXT1JEfXtTQUxUfSQ/$MTIzNDU2Nzg5$8PhwWanVRnpJAFK4NUjR0w=="),
    ("Kratos sha1", "test", "$sha1$pf=JHtQQVNTV09SRH0ke1NBTFR9JA==$NW9wbWtnejAzcg==$iE5n1yjX3oAdxRHwZ4u57I4LpQo="),
    ("Kratos md5-crypt", "ory", "$md5-crypt$xWMlm2eL$GGTOpgZu4p2k6ORprAu3b."),
    # A realm of the Apache Iceberg examples, and the demo realms of Gloo
    (
        "Keycloak argon2",
        "iceberg",
        sources.keycloak(
            '{"value":"BuViHNDGmCq80fvpty/QoggTI8NSt0CuNDGgeoa5f5A=","salt":"RJ0aLMQ2qKbZuROs7qQhcA==",'
            '"additionalParameters":{}}',
            '{"hashIterations":5,"algorithm":"argon2","additionalParameters":{"hashLength":["32"],"memory":["7168"],'
            '"type":["id"],"version":["1.3"],"parallelism":["1"]}}',
        ),
    ),
    (
        "Keycloak pbkdf2",
        "password",
        sources.keycloak(
            '{"value":"JsfNbCOIdZUbyBJ+BT+VoGI91Ec2rWLOvkLPDaX8e9k=","salt":"P5rtFkGtPfoaryJ6PizUJw==",'
            '"additionalParameters":{}}',
            '{"hashIterations":27500,"algorithm":"pbkdf2-sha256","additionalParameters":{}}',
        ),
    ),
]
