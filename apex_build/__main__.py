from apex_build.cli import main

main()
