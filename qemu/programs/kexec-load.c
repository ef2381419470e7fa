/*
 * Loads a kernel for a crash (-p) or for a plain kexec (-l), by the system
 * call that has the kernel itself prepare the image, and jumps into it (-e).
 *
 *   kexec-load -p|-l KERNEL INITRD CMDLINE
 *   kexec-load -e
 */
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <sys/syscall.h>

#include "planted.h"

static int load(const char *kernel, const char *initrd, const char *cmdline,
		unsigned long flags)
{
	int kernel_file = open(kernel, O_RDONLY), initrd_file = open(initrd, O_RDONLY);

	CHECK(kernel_file >= 0);
	CHECK(initrd_file >= 0);
	CHECK(syscall(SYS_kexec_file_load, kernel_file, initrd_file, strlen(cmdline) + 1,
		      cmdline, flags) == 0);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "-p"))
		return load(argv[2], argv[3], argv[4], KEXEC_FILE_ON_CRASH);
	if (argc == 5 && !strcmp(argv[1], "-l"))
		return load(argv[2], argv[3], argv[4], 0);
	if (argc == 2 && !strcmp(argv[1], "-e")) {
		sync();
		CHECK(syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
			      LINUX_REBOOT_CMD_KEXEC, NULL) == 0);
	}
	fprintf(stderr, "usage: kexec-load -p|-l KERNEL INITRD CMDLINE | -e\n");
	return 2;
}
